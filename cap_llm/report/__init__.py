"""Tables and pages from the results that stages wrote."""
