"""From picture to record: encodes a captioned image data set once into the store."""
