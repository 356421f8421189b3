// Loaded before libc by tests/test_network.py: refuses what would leave the machine, and writes each attempt to the
// file NETWORK_LOG. Unlike a hook in Python it sees what compiled libraries do, too.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *where) {
    FILE *file = fopen(getenv("NETWORK_LOG"), "a");
    fprintf(file, "%s %s\n", what, where);
    fclose(file);
}

static int is_remote(const struct sockaddr *address, const char *what) {
    char text[INET6_ADDRSTRLEN] = "";
    if (address && address->sa_family == AF_INET) {
        const struct in_addr *ip = &((const struct sockaddr_in *)address)->sin_addr;
        if (ntohl(ip->s_addr) >> 24 != 127) inet_ntop(AF_INET, ip, text, sizeof text);
    } else if (address && address->sa_family == AF_INET6) {
        const struct in6_addr *ip = &((const struct sockaddr_in6 *)address)->sin6_addr;
        if (!IN6_IS_ADDR_LOOPBACK(ip)) inet_ntop(AF_INET6, ip, text, sizeof text);
    }
    if (*text) note(what, text);
    return *text != 0;
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    if (!is_remote(address, "connect")) return real(fd, address, length);
    errno = ECONNREFUSED;
    return -1;
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length) {
    ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    if (!is_remote(address, "sendto")) return real(fd, data, size, flags, address, length);
    errno = ECONNREFUSED;
    return -1;
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) = dlsym(RTLD_NEXT, __func__);
    char own[256] = "";
    gethostname(own, sizeof own - 1);
    if (!name || !strcmp(name, "localhost") || !strncmp(name, "127.", 4) || !strcmp(name, "::1") || !strcmp(name, own))
        return real(name, service, hints, found);
    note("getaddrinfo", name);
    return EAI_FAIL;
}
