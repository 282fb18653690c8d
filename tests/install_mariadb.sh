#!/bin/sh
# What the tests on MariaDB need, if it is missing and if we may: a server, its RocksDB
# where there is one, and mysqlclient with what it builds with. Without, the tests say at
# their end what they left out. Argument: the interpreter of the virtual environment.
python=$1

if ! PATH="$PATH:/usr/sbin:/usr/libexec" command -v mariadbd mysqld >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        install='apt-get install --yes --quiet --no-install-recommends'
        { apt-get update --quiet && $install mariadb-server && $install \
            mariadb-plugin-rocksdb; } || echo 'apt-get failed' >&2
    else
        echo 'MariaDB is not installed, and not ours to install: as root,' >&2
        echo '  apt-get install mariadb-server mariadb-plugin-rocksdb' >&2
    fi
fi

"$python" -c 'import MySQLdb' 2>/dev/null && exit
pip="$python -m pip install --quiet --disable-pip-version-check mysqlclient"
$pip 2>/dev/null && exit
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet \
        --no-install-recommends gcc libc6-dev libmariadb-dev pkg-config
fi
if ! $pip; then
    echo 'mysqlclient can not be built: it needs gcc, pkg-config, libmariadb-dev' >&2
fi
