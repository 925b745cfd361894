"""Results and models in the formats of other software."""

FORMATS = ("onnx", "torch", "monai")  # of networks; what each is stands in `kanseg.export.network`
AGREE = 0.95  # least Dice of label maps by an int8 file with those of its original
