"""The ten phases, one file each."""
