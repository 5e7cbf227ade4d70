"""From a running forward to the step buffer: when to look, which hooks stand, what each observer keeps."""
