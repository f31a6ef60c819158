"""The algebra of linear operators over space or time: everything that one convolution can stand for."""
