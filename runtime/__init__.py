"""What every script needs and no concept owns: the command line, files, the device, processes."""
