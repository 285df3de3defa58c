"""Recipe names to objects: the only place that knows concrete classes."""
