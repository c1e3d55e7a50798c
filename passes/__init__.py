"""Passes that ship with ktcompile: one a file, found through entry points like anybody's."""
