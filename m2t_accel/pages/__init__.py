"""Pages about runs: report.html of one run, and the comparison of several. They read the folders of runs alone."""
