"""Results and models in the formats of other software."""

FORMATS = ("onnx", "torch", "monai")  # of networks; what each is stands in `kanseg.export.network`
