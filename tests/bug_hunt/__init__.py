"""The bug hunt: planted bugs that one `debug.doctor` call must find by reference, without a hint.

`python -m tests.bug_hunt` plants them one by one into random models and prints what was found.
"""
