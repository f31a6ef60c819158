"""Values and programs compared: the judge of contracts, captures and exports."""
