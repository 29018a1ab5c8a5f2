"""Who may do what: Cedar rules beside their cases, read as one set. docs/policies.md

question   a request as rules see it: principal, action, resource, context
cedar      schema and rules, parsed once; decides
"""
