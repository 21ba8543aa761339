"""What a run found, for people: a table in the terminal and one page with plots."""
