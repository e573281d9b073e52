"""Set-up of the environment that the demo and the tests run in."""
