"""Pages and pictures: what was measured and scored as one HTML file, and the heat map as a PNG."""
