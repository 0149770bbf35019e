"""Many runs from one file, and their results."""
