"""What a gateway's settings file says on a stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lacre.jose.jws import b64u
from lacre_fabric.operate import dev_issuer
from lacre_fabric.operate.site import Site
from lacre_gateway.budget.plans import PLANS_FILE
from lacre_gateway.settings import shipped

POOL = "default"


def gateway_settings(
    name: str, url: str, trust: bytes, nats: Sequence[str], signing_key: str, credentials: object, lines: str, tables: str
) -> str:
    """url: where applications find it. lines: further ones of the top table. tables: further ones, as TOML."""
    return f"""
        gateway = "{name}"
        public_url = "{url}"
        trust = "{b64u(trust)}"
        signing_key = "{signing_key}"
        {lines}
        [nats]
        url = {json.dumps(list(nats))}
        credentials = "{credentials}"
        {tables}
    """


def issuer_table(issuer: str, audience: str, jwks: object, algorithms: Sequence[str] = ("EdDSA", "ES256", "RS256")) -> str:
    """jwks: the file with its keys."""
    return f"""
        [[issuers]]
        issuer = "{issuer}"
        audience = "{audience}"
        algorithms = {json.dumps(list(algorithms))}
        jwks = "{jwks}"
    """


def own_issuer(site: Site) -> str:
    """The table of the site's development issuer."""
    return issuer_table(dev_issuer.ISSUER, dev_issuer.AUDIENCE, site.folder / "issuer.jwks", ["EdDSA"])


def policies_with(plans: str, folder: Path) -> Path:
    """The rules that ship, with other plans. folder: is made."""
    shutil.copytree(shipped(), folder)
    (folder / PLANS_FILE).write_text(plans)
    return folder
