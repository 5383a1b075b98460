"`pip install ARGUMENTS` into the environment that runs this, by uv where it can be had: several times as fast"
import ast
import os
import subprocess
import sys

_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
_LISTS = {"extra-index-url": "--extra-index-url", "find-links": "--find-links", "constraint": "-c"}  # uv reads no settings of pip


def _settings() -> dict[str, str]:
    "What pip is told by its files and by the environment, which comes first"
    found: dict[str, str] = {}
    lines = subprocess.run([*_PIP, "config", "list"], capture_output=True, text=True).stdout.splitlines()
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        found[name.split(".")[-1]] = ast.literal_eval(value)
    return found


def uv_command() -> tuple[list[str], dict[str, str]]:
    "The command of uv that looks where pip would, and its environment"
    settings, args = _settings(), ["--index-strategy", "unsafe-best-match"]
    if url := settings.get("index-url"): args += ["--index-url", url]
    for name, option in _LISTS.items():
        for value in settings.get(name, "").split(): args += [option, value]
    env = {**os.environ, "UV_LINK_MODE": "copy"}
    if cert := settings.get("cert"): env["SSL_CERT_FILE"] = cert
    return [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, *args], env


def main(args: list[str]) -> int:
    "Try uv, then pip, whose messages are the ones shown"
    if subprocess.run([*_PIP, "install", "--quiet", "uv"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        command, env = uv_command()
        if subprocess.run([*command, *args], env=env).returncode == 0: return 0
        print("uv could not install that; pip tries.", file=sys.stderr)
    return subprocess.run([*_PIP, "install", "--quiet", *args]).returncode


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
