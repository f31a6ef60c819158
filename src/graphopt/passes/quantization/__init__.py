"""What quantize measures: ranges of values, rounding fitted to data, and which matrices bear few bits."""
