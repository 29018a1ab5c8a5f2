"""Who may do what: Cedar rules beside their cases, read as one set. docs/policies.md

question   a request as rules see it: principal, action, resource, context
cedar      schema and rules, parsed once; decides
cases      requests written down, and how they must be decided
rules      the set in its folder, read and checked as a whole
trial      tries a set in a process of its own
explain    why a request is decided as it is
replay     a log's requests, decided anew under other rules
live       the set that decides now, and its successor
"""
