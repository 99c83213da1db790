"""The subcommands of `qmir`, one file each."""
