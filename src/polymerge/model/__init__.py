"""What a decoder is (spec), how it runs (decoder), and an expert opened lazily (source)."""
