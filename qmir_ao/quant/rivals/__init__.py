"""Published quantizers to compare with, on the same graph machinery as DLS and RFA."""
