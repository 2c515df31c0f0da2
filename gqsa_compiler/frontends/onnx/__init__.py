"""ONNX graphs into Relax, and the operators in which a GQSA layer lies in an ONNX file."""
