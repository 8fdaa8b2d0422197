"""Files: blobs, layers, images and their names."""
