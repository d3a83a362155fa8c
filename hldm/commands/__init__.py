"""What `hldm` can do: a function a command, its typed parameters the options, its docstring the help."""
