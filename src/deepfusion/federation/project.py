"""A federation's folder: recipe, certificates, keys, Flower's files; everything that plain Flower commands need."""

from __future__ import annotations

import datetime
import ipaddress
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from deepfusion.config import Recipe
from deepfusion.elsewhere import refuse
from deepfusion.errors import InputError
from deepfusion.federation.manifest import public_key

DEVICE = "device.yaml"  # what a device knows of itself
CONNECTION = "federation"  # the name of the server in Flower's config.toml
HERE = ("127.0.0.1", "localhost")  # by which the server's own processes know it
HOME = 'export FLWR_HOME="$PWD"'  # where Flower looks for config.toml, and unpacks apps; for each terminal anew
VALID = datetime.timedelta(days=3650)


@dataclass(frozen=True)
class Project:
    """Where things are in a federation's folder."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe."""
        return self.root / "recipe.yaml"

    @property
    def keys(self) -> Path:
        """Public keys of the devices."""
        return self.root / "keys"

    @property
    def inbox(self) -> Path:
        """What has been collected."""
        return self.root / "inbox"

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.root / "run"

    def device(self, name: str) -> Path:
        """What is to be carried to a device."""
        return self.root / "devices" / name


def init(root: Path, recipe: Recipe, tree: dict[str, object], hosts: Iterable[str], port: int) -> Project:
    """Make a federation's folder.

    Args:
        root: the folder, which must be empty or not there.
        recipe: the recipe, with a `federation` section.
        tree: the recipe as it is to be written down.
        hosts: names and addresses that devices know the server by; the first one stands in the commands.
        port: of the server.

    Raises:
        InputError: the folder is in use, or `flwr run` would refuse the recipe; nothing is made then.
    """
    refuse(recipe)
    assert recipe.federation is not None
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root} is there already: give another folder")
    project, names = Project(root), list(hosts)
    for folder in (project.keys, root / "server", root / "app" / "deepfusion_app"):
        folder.mkdir(parents=True)
    (root / ".gitignore").write_text("*\n", encoding="utf-8")
    authority = _certificates(root / "server", list(dict.fromkeys([*names, *HERE])))
    for name in recipe.federation.devices:
        folder = project.device(name)
        folder.mkdir(parents=True)
        private = ec.generate_private_key(ec.SECP384R1())
        public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _secret(folder / "node.key", _openssh(private))
        (project.keys / f"{name}.pub").write_bytes(public + f" {name}\n".encode())
        (folder / "ca.crt").write_bytes(authority)
        (folder / DEVICE).write_text(_template(DEVICE).replace("NAME", name), encoding="utf-8")
    certificate = json.dumps(str((root / "server" / "ca.crt").absolute()))  # Flower wants it absolute
    (root / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{_address(HERE[0], port)}"\nroot-certificates = {certificate}\n',
        encoding="utf-8",
    )
    (root / "app" / "pyproject.toml").write_text(_template("app.toml"), encoding="utf-8")
    (root / "app" / "deepfusion_app" / "__init__.py").write_text(
        '"""The Flower app of a federation; all of it is in deepfusion."""\n', encoding="utf-8"
    )
    for side, of in (("client", "device"), ("server", "server")):
        code = f'"""The {side} side."""\n\nfrom deepfusion.federation.{of} import app\n\n__all__ = ["app"]\n'
        (root / "app" / "deepfusion_app" / f"{side}.py").write_text(code, encoding="utf-8")
    # Last: a folder with a recipe has all the rest.
    project.recipe.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return project


def node_keys(keys: Path, devices: Iterable[str]) -> dict[bytes, str]:
    """Public key, as Flower's nodes have it → the device.

    Raises:
        InputError: a device has no key, or one that cannot be read.
    """
    found: dict[bytes, str] = {}
    for device in devices:
        found[public_key_to_bytes(public_key(keys / f"{device}.pub"))] = device
    return found


def superlink(port: int) -> list[str]:
    """The command of the server, to be run in the federation's folder."""
    return [
        "deepfusion-superlink", "--host", "0.0.0.0", "--port", str(port),
        "--ssl-ca-certfile", "server/ca.crt", "--ssl-certfile", "server/server.crt",
        "--ssl-keyfile", "server/server.key",
        "--enable-supernode-auth", "--database", "server/state.db", "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def supernode(host: str, port: int) -> list[str]:
    """The command of a device, to be run in its own folder."""
    return [
        "flower-supernode", "--superlink", _address(host, port), "--root-certificates", "ca.crt",
        "--auth-supernode-private-key", "node.key", "--node-config", 'file="device.yaml"',
    ]  # fmt: skip


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _template(name: str) -> str:
    return (files("deepfusion") / "templates" / "federation" / name).read_text(encoding="utf-8")


def _certificates(folder: Path, hosts: list[str]) -> bytes:
    """Make an authority and the server's certificate by it; returns the authority's own certificate."""
    authority, own = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = _name("deepfusion federation")
    root = (
        _certificate(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    leaf = (
        _certificate(_name(hosts[0]), issuer, own.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.SubjectAlternativeName([_host(name) for name in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority, hashes.SHA256())
    )
    made = root.public_bytes(serialization.Encoding.PEM)
    (folder / "ca.crt").write_bytes(made)
    (folder / "server.crt").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    _secret(folder / "ca.key", _pem(authority))
    _secret(folder / "server.key", _pem(own))
    return made


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + VALID)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def _secret(path: Path, content: bytes) -> None:
    """Write what nobody else may read."""
    path.touch(mode=0o600)
    path.write_bytes(content)
