"""Code that runs inside the sandbox, where only the standard library exists, not the rest of the package."""
