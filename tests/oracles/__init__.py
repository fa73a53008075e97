"""Reference implementations in plain NumPy (float64), written from the specs alone, to test the library against."""
