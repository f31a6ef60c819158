"""Linear operators over space or time, read as affine forms that one convolution can compute."""
