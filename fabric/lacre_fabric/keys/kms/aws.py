"""AWS KMS, through boto3: `awskms://[HOST[:PORT]]/KEY[?region=REGION]`. KEY: an ARN, a key id, or alias/NAME.

The context is AWS's EncryptionContext, so key policies can require a pool, and CloudTrail shows it. Credentials: boto3's
default chain (environment, profile, web identity, container or instance role). HOST: a VPC endpoint, or a test server.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

from lacre.errors import SettingsError
from lacre_fabric.keys.kms.address import Address
from lacre_fabric.keys.kms.protocol import EncryptionContext, KeyWithheld, Kms, KmsError, KmsUnreachable, WrongWrapping

_WITHHELD: Final = frozenset({
    "AccessDeniedException", "DisabledException", "KMSInvalidStateException", "NotFoundException", "KeyUnavailableException",
    "InvalidGrantTokenException", "ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException",
})  # fmt: skip
_WRONG: Final = frozenset(
    {"InvalidCiphertextException", "IncorrectKeyException", "InvalidKeyUsageException", "ValidationException"}
)


def connect(address: Address) -> Kms:
    address.only("region")
    if not address.path.strip("/"):
        raise SettingsError("awskms: needs a key, for example awskms:///alias/lacre?region=eu-central-1")
    # At DEBUG botocore would log whole bodies, including data keys.
    logging.getLogger("botocore").setLevel(logging.INFO)
    config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 3})
    endpoint = address.origin if address.host else None
    try:
        client = boto3.client("kms", region_name=address.options.get("region"), endpoint_url=endpoint, config=config)
    except NoRegionError as exc:
        raise SettingsError("awskms: needs a region: add ?region=..., or set AWS_REGION") from exc
    return AwsKms(client, address.path.removeprefix("/"))


class AwsKms:
    scheme = "awskms"
    binds = True

    def __init__(self, client: Any, key: str) -> None:
        self._client, self._key = client, key

    def wrap(self, data_key: bytes | bytearray, context: EncryptionContext) -> bytes:
        said = self._ask("encrypt", Plaintext=bytes(data_key), EncryptionContext=context.members())
        return bytes(said["CiphertextBlob"])

    def unwrap(self, wrapped: bytes, context: EncryptionContext) -> bytearray:
        # Name the key, so that AWS uses no other key that this process may use.
        return bytearray(self._ask("decrypt", CiphertextBlob=wrapped, EncryptionContext=context.members())["Plaintext"])

    def close(self) -> None:
        self._client.close()

    def _ask(self, operation: str, **arguments: object) -> Any:
        try:
            return getattr(self._client, operation)(KeyId=self._key, **arguments)
        except ClientError as exc:
            raise self._refused(str(exc.response.get("Error", {}).get("Code", "")), operation) from None
        except NoCredentialsError:
            raise SettingsError("awskms: no credentials: give this process an AWS role or profile") from None
        except BotoCoreError as exc:
            raise KmsUnreachable(f"AWS KMS does not answer ({type(exc).__name__})") from None

    def _refused(self, code: str, operation: str) -> KmsError:
        if code in _WITHHELD:
            return KeyWithheld(f"AWS KMS does not {operation} with {self._key} ({code})")
        if code in _WRONG:
            return WrongWrapping(f"AWS KMS does not {operation} this with {self._key} ({code})")
        return KmsUnreachable(f"AWS KMS cannot {operation} now ({code or 'no reason given'})")
