"""Models, training, evaluation and the command line."""

if __name__ != "qmir_ao.recipes":
    raise ImportError("import qmir_ao.recipes, not recipes")
