"""Many runs of one recipe side by side: over seeds, and over values of its keys; with intervals and paired tests.

`grid` says what is to run, `collect` runs it and gathers, `statistics` and `study` work out, `sections` and `formats`
write it down.
"""
