"""Graph passes that turn a converted graph into integer operators."""

if __name__ != "qmir_ao.passes":
    raise ImportError("import qmir_ao.passes, not passes")
