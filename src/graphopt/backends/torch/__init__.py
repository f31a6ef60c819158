"""Programs as modules and exported programs of torch."""
