"""The command line: arguments and printing only. Heavy imports stay inside functions."""
