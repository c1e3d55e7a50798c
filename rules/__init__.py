"""The pipelines that ship with ktcompile."""
