// SPDX-License-Identifier: Apache-2.0
/*
 * The smallest TCP load that four figures need, so that no program outside of Debian main is necessary.
 *
 *   tcp serve PORT                                 one connection after the other, until killed
 *   tcp stream|rr|crr ADDRESS PORT SECONDS         prints bytes, transactions or connections per second
 *
 * The first byte of a connection tells the server which of the three it is.
 */
#define _GNU_SOURCE
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static char buffer[128 * 1024];

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* A peer that is silent must end the run, not hang it. */
static void prepare(int connection)
{
	struct timeval limit = { .tv_sec = 5 };
	int on = 1;

	setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

static void serve_one(int connection)
{
	char kind;

	if (read(connection, &kind, 1) != 1)
		return;
	if (kind == 's') {
		while (read(connection, buffer, sizeof(buffer)) > 0)
			;
		return;
	}
	/* A request is one byte; the kind of the connection was the first one. */
	while (write(connection, &kind, 1) == 1 && read(connection, &kind, 1) == 1)
		;
}

static int serve(const char *port)
{
	struct addrinfo hints = { .ai_family = AF_INET6, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE };
	struct addrinfo *address;
	int listener, on = 1, off = 0;

	if (getaddrinfo(NULL, port, &hints, &address))
		fail("getaddrinfo");
	listener = socket(AF_INET6, SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
	if (bind(listener, address->ai_addr, address->ai_addrlen) || listen(listener, 128))
		fail("listen");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int connection = accept(listener, NULL, NULL);

		if (connection < 0)
			fail("accept");
		prepare(connection);
		serve_one(connection);
		close(connection);
	}
}

static int dial(const struct addrinfo *address)
{
	int connection = socket(address->ai_family, SOCK_STREAM, 0);

	prepare(connection);
	if (connect(connection, address->ai_addr, address->ai_addrlen))
		fail("connect");
	return connection;
}

/* Reset instead of an orderly end: no TIME_WAIT, so ports never run out. */
static void drop(int connection)
{
	struct linger none = { .l_onoff = 1, .l_linger = 0 };

	setsockopt(connection, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
	close(connection);
}

static void transact(int connection)
{
	char byte = 'r';

	if (write(connection, &byte, 1) != 1 || read(connection, &byte, 1) != 1)
		fail("transaction");
}

static double stream(int connection, double seconds)
{
	double began = now(), done = 0;
	char kind = 's';

	if (write(connection, &kind, 1) != 1)
		fail("write");
	while (now() - began < seconds) {
		ssize_t count = write(connection, buffer, sizeof(buffer));

		if (count <= 0)
			fail("write");
		done += (double)count;
	}
	return done / (now() - began);
}

int main(int count, char **words)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *address;
	double seconds, began, done = 0;
	int connection;

	signal(SIGPIPE, SIG_IGN);
	if (count == 3 && !strcmp(words[1], "serve"))
		return serve(words[2]);
	if (count < 5 || getaddrinfo(words[2], words[3], &hints, &address))
		return 2;
	seconds = atof(words[4]);
	if (!strcmp(words[1], "stream")) {
		connection = dial(address);
		printf("%.0f\n", stream(connection, seconds));
		drop(connection);
		return 0;
	}
	connection = strcmp(words[1], "crr") ? dial(address) : -1;
	for (began = now(); now() - began < seconds; done++) {
		if (connection >= 0) {
			transact(connection);
			continue;
		}
		int once = dial(address);

		transact(once);
		drop(once);
	}
	printf("%.0f\n", done / (now() - began));
	return 0;
}
