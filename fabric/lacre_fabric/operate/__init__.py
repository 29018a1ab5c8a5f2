"""One site's operator: the state folder, `lacre up` and `lacre demo`, rotation, bundles and checks.

Rules: a command changes nothing before it has checked everything; what a person wrote into a file stays.
Open `commands.py` first: it has every sub-command. `site.py` is the state folder, `rotation.py` changes keys,
and `up.py` runs a whole site on one machine.
"""
