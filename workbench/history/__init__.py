"""Container to image, and what lies between images."""
