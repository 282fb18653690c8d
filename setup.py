"""What is installed. The tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

extras = {
    "admin": [],
    # isal is optional, and installed where that needs no compiler.
    "client": [
        "ZODB >= 5.6",
        "isal >= 1.6; sys_platform == 'linux' and implementation_name == 'cpython'"
        " and python_version < '3.16'"
        " and (platform_machine == 'x86_64' or platform_machine == 'aarch64')",
    ],
    "ctl": [],
    "master": [],
    "storage-importer": ["ZODB >= 5.6", "setproctitle"],
    "storage-mysqldb": ["mysqlclient"],
    "storage-pymysql": ["PyMySQL"],
    "storage-sqlite": [],
    "zodburi": ["zodburi >= 2.5"],
}
# What a cluster on SQLite and its tools need: no compiler, no header.
extras["all"] = sorted(
    {
        requirement
        for extra in ("admin", "client", "ctl", "master", "storage-sqlite", "zodburi")
        for requirement in extras[extra]
    }
)
extras["test"] = [
    *extras["all"],
    *extras["storage-pymysql"],  # mysqlclient: see tests/install_mariadb.sh
    "ZEO >= 6",
    "Zope[wsgi]",
    "coverage",
    "greenlet",
    "hypothesis",
    "mypy",
    "pytest >= 8",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "types-python-dateutil",
]
# The peers that NEO is compared with.
extras["bench"] = [*extras["all"], "RelStorage >= 4", "ZEO >= 6", "mysqlclient"]

commands = [
    "neoadmin",
    "neoctl",
    "neolog",
    "neomaster",
    "neomigrate",
    "neosimple",
    "neostorage",
]

setup(
    name="neoppod",
    version="2.0.dev0",
    description="Distributed, redundant and transactional storage for ZODB",
    long_description="\n\n".join(
        (here / name).read_text(encoding="utf-8")
        for name in ("README.rst", "CHANGES.rst")
    ),
    long_description_content_type="text/x-rst",
    license="GPL-2.0-or-later",
    license_files=["LICENSE"],
    platforms=["Linux"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: ZODB",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: Implementation :: CPython",
        "Topic :: Database",
        "Topic :: System :: Distributed Computing",
    ],
    python_requires=">= 3.11",
    packages=find_packages(include=["neo", "neo.*"]),
    package_data={"neo.client": ["component.xml"]},
    install_requires=["msgpack >= 1.0", "python-dateutil", "zc.lockfile"],
    extras_require=extras,
    entry_points={
        "console_scripts": [f"{name} = neo.scripts.{name}:main" for name in commands],
        "zodburi.resolvers": [
            f"{scheme} = neo.client.zodburi:NEOStorageURIResolver"
            for scheme in ("neo", "neos")
        ],
    },
    zip_safe=False,
)
