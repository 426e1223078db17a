"""The number formats that weights can run in. Needs no torch."""

# What a command may be given. "auto" is chosen for the device, see far.pipeline.resolve_dtype.
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
