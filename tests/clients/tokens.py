#!/usr/bin/env python3
"""Keys and tokens as an issuer makes them, by a library of its own.

    tokens.py key KID ALG FILE      makes a private key, keeps it in FILE, prints its public JWK
    tokens.py sign FILE CLAIMS      prints a token with these claims, JSON, signed with that key
"""

import json
import pathlib
import sys

from joserfc import jwt
from joserfc.jwk import ECKey, JWKRegistry, OKPKey, RSAKey

KINDS = {
    "ES256": lambda parameters: ECKey.generate_key("P-256", parameters),
    "RS256": lambda parameters: RSAKey.generate_key(2048, parameters),
    "EdDSA": lambda parameters: OKPKey.generate_key("Ed25519", parameters),
}


def main() -> None:
    match sys.argv[1:]:
        case ["key", kid, algorithm, file]:
            key = KINDS[algorithm]({"kid": kid, "alg": algorithm, "use": "sig"})
            pathlib.Path(file).write_text(json.dumps(key.as_dict(private=True)))
            print(json.dumps(key.as_dict(private=False)))
        case ["sign", file, claims]:
            key = JWKRegistry.import_key(json.loads(pathlib.Path(file).read_text()))
            header = {"kid": key.kid, "alg": key.get("alg")}
            print(jwt.encode(header, json.loads(claims), key, algorithms=[header["alg"]]))
        case _:
            sys.exit(__doc__)


main()
