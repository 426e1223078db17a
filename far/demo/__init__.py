"""The web demo: a page on which images appear token by token, and two models draw the same one beside each other."""
