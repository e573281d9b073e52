"""Life-cycle decisions, and one thin adapter a framework generation."""
