#!/bin/sh
# What the tests on MariaDB need, if it is missing and if we may: a server, its RocksDB
# where there is one, and mysqlclient with what it builds with. Without, the tests say at
# their end what they left out. Argument: the interpreter of the virtual environment.
python=$1
server='mariadb-server mariadb-plugin-rocksdb'
build='gcc libc6-dev libmariadb-dev pkg-config'
# An interpreter of Debian has its headers elsewhere.
headers=$("$python" -c '
import os.path, sys, sysconfig
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python%d.%d-dev" % sys.version_info[:2])')
pip="$python -m pip install --quiet --disable-pip-version-check mysqlclient"
export DEBIAN_FRONTEND=noninteractive
install='apt-get install --yes --quiet --no-install-recommends'

may_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

PATH="$PATH:/usr/sbin:/usr/libexec"
command -v mariadbd >/dev/null || command -v mysqld >/dev/null || no_server=1
"$python" -c 'import MySQLdb' 2>/dev/null || $pip 2>/dev/null || no_driver=1
[ "$no_server$no_driver" ] || exit 0
if may_install; then
    apt-get update --quiet
    if [ "$no_server" ]; then
        for package in $server; do # not everywhere is a RocksDB
            $install $package || echo "apt-get failed: $package" >&2
        done
    fi
    if [ "$no_driver" ]; then
        $install $build $headers && $pip && exit
        echo "mysqlclient can not be built: it needs $build $headers" >&2
    fi
else
    echo 'What tests on MariaDB need is not installed, and not ours to install.' >&2
    echo "As root: apt-get install $server $build $headers" >&2
fi
