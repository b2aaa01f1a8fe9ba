/* Unix sockets: pairs, names, queues, descriptors in flight, half-closed ends. */
#include "work.h"
#include <sys/socket.h>
#include <sys/un.h>

static void send_file(int socket, const char *text, int file)
{
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec iov = { (void *)text, strlen(text) };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET, header->cmsg_type = SCM_RIGHTS, header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &file, sizeof file);
    CHECK(sendmsg(socket, &message, 0) == (ssize_t)strlen(text));
}

static int receive_file(int socket, char *text, size_t size)
{
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec iov = { text, size };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    int file = -1;
    ssize_t n = recvmsg(socket, &message, MSG_DONTWAIT);
    CHECK(n >= 0);
    text[n] = 0;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header)
        memcpy(&file, CMSG_DATA(header), sizeof file);
    return file;
}

static int named(int type, const char *path, int backlog)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, type, 0);
    size_t length = path[0] == '@' ? strlen(path) : strlen(path) + 1;
    strcpy(address.sun_path, path);
    if (path[0] == '@')
        address.sun_path[0] = 0;
    else
        unlink(path);
    CHECK(bind(fd, (void *)&address, (socklen_t)(2 + length)) == 0);
    if (backlog)
        CHECK(listen(fd, backlog) == 0);
    return fd;
}

static int joined(int type, const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, type, 0);
    strcpy(address.sun_path, path);
    size_t length = path[0] == '@' ? strlen(path) : strlen(path) + 1;
    if (path[0] == '@')
        address.sun_path[0] = 0;
    CHECK(connect(fd, (void *)&address, (socklen_t)(2 + length)) == 0);
    return fd;
}

int main(void)
{
    char directory[64], stream_path[108], dgram_path[108], hidden_name[40], own_path[108], got[64];
    CHECK(getcwd(directory, sizeof directory));
    snprintf(stream_path, sizeof stream_path, "%s/stream", directory);
    snprintf(dgram_path, sizeof dgram_path, "%s/dgram", directory);
    struct sockaddr_un at_rest = { .sun_family = AF_UNIX, .sun_path = "\0ckpt-unixes-at-rest" };
    int pair[2], packets[2], half[2], dgrams[2], gone[2], reset[2], silent[2], fresh, at_home, tube[2], file, carried;
    snprintf(hidden_name, sizeof hidden_name, "@ckpt-unixes-%d", getpid());
    int server = named(SOCK_STREAM, stream_path, 5), client = joined(SOCK_STREAM, stream_path), accepted = accept(server, NULL, NULL);
    int hidden = named(SOCK_SEQPACKET, hidden_name, 5), packet_client = joined(SOCK_SEQPACKET, hidden_name), packet_accepted = accept(hidden, NULL, NULL);
    int mailbox = named(SOCK_DGRAM, dgram_path, 0), sender = joined(SOCK_DGRAM, dgram_path), waiting;
    struct sockaddr_un address;
    socklen_t length = sizeof address;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) == 0 && socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packets) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, half) == 0 && socketpair(AF_UNIX, SOCK_DGRAM, 0, dgrams) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, gone) == 0);
    CHECK(send(half[1], "left", 4, 0) == 4 && send(pair[1], "right", 5, 0) == 5);
    CHECK(pipe(tube) == 0 && write(tube[1], "in the pipe", 11) == 11);
    file = open("carried", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(write(file, "carried content", 15) == 15 && lseek(file, 8, SEEK_SET) == 8);
    send_file(pair[0], "with file", file);
    send_file(pair[0], "with pipe", tube[0]);
    CHECK(close(tube[0]) == 0 && close(file) == 0); /* now only in flight */
    CHECK(send(packets[0], "one", 3, 0) == 3 && send(packets[0], "two two", 7, 0) == 7);
    CHECK(send(dgrams[0], "d1", 2, 0) == 2 && send(dgrams[0], "d22", 3, 0) == 3);
    CHECK(send(half[0], "last words", 10, 0) == 10 && shutdown(half[0], SHUT_WR) == 0);
    CHECK(send(gone[0], "from the grave", 14, 0) == 14 && close(gone[0]) == 0);
    /* Not connected. */
    CHECK((fresh = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0 && (at_home = socket(AF_UNIX, SOCK_SEQPACKET, 0)) >= 0);
    CHECK(bind(at_home, (struct sockaddr *)&at_rest, sizeof at_rest) == 0);
    /* Closed with something unread in them. */
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, reset) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, silent) == 0);
    CHECK(send(reset[0], "last words", 10, 0) == 10 && send(reset[1], "?", 1, 0) == 1 && close(reset[0]) == 0);
    CHECK(send(silent[1], "?", 1, 0) == 1 && close(silent[0]) == 0);
    CHECK(send(client, "to server", 9, 0) == 9 && send(accepted, "to client", 9, 0) == 9);
    CHECK(send(packet_client, "packet", 6, 0) == 6);
    CHECK(send(sender, "mail 1", 6, 0) == 6 && send(sender, "mail two", 8, 0) == 8);
    snprintf(own_path, sizeof own_path, "%s/own", directory);
    int both = named(SOCK_STREAM, own_path, 0); /* a client with a name of its own */
    address = (struct sockaddr_un){ .sun_family = AF_UNIX };
    strcpy(address.sun_path, stream_path);
    CHECK(connect(both, (void *)&address, (socklen_t)(2 + strlen(stream_path) + 1)) == 0);
    int from_both = accept(server, NULL, NULL);
    waiting = joined(SOCK_STREAM, stream_path); /* not accepted yet */
    ready();

    CHECK(recv(half[0], got, 64, 0) == 4 && !memcmp(got, "left", 4) && recv(pair[0], got, 64, 0) == 5);
    CHECK((carried = receive_file(pair[1], got, 60)) >= 0 && !strcmp(got, "with file"));
    CHECK(read(carried, got, 20) == 7 && !memcmp(got, "content", 7)); /* its position came along */
    CHECK((carried = receive_file(pair[1], got, 60)) >= 0 && !strcmp(got, "with pipe"));
    CHECK(read(carried, got, 20) == 11 && !memcmp(got, "in the pipe", 11));
    CHECK(recv(pair[1], got, 1, 0) == -1 && errno == EAGAIN);
    CHECK(recv(packets[1], got, 64, 0) == 3 && recv(packets[1], got, 64, 0) == 7 && !memcmp(got, "two two", 7));
    CHECK(recv(dgrams[1], got, 64, 0) == 2 && recv(dgrams[1], got, 64, 0) == 3 && !memcmp(got, "d22", 3));
    CHECK(send(dgrams[1], "back", 4, 0) == 4 && recv(dgrams[0], got, 64, 0) == 4);
    CHECK(recv(half[1], got, 64, 0) == 10 && recv(half[1], got, 64, 0) == 0);
    CHECK(send(half[1], "still open", 10, 0) == 10 && recv(half[0], got, 64, 0) == 10);
    CHECK(recv(fresh, got, 64, 0) == -1 && errno == EINVAL);
    CHECK(connect(fresh, (struct sockaddr *)&at_rest, sizeof at_rest) == -1);
    CHECK(listen(at_home, 1) == 0);
    CHECK(recv(reset[1], got, 64, 0) == 10 && !memcmp(got, "last words", 10));
    CHECK(recv(reset[1], got, 64, 0) == -1 && errno == ECONNRESET && recv(reset[1], got, 64, 0) == 0);
    CHECK(recv(silent[1], got, 64, 0) == -1 && errno == ECONNRESET && recv(silent[1], got, 64, 0) == 0);
    CHECK(recv(gone[1], got, 64, 0) == 14 && !memcmp(got, "from the grave", 14) && recv(gone[1], got, 64, 0) == 0);
    CHECK(recv(accepted, got, 64, 0) == 9 && !memcmp(got, "to server", 9) && recv(client, got, 64, 0) == 9);
    CHECK(getsockname(accepted, (void *)&address, &length) == 0 && !strcmp(address.sun_path, stream_path));
    length = sizeof address;
    CHECK(getpeername(client, (void *)&address, &length) == 0 && !strcmp(address.sun_path, stream_path));
    length = sizeof address;
    CHECK(getpeername(from_both, (void *)&address, &length) == 0 && !strcmp(address.sun_path, own_path));
    length = sizeof address;
    CHECK(getsockname(from_both, (void *)&address, &length) == 0 && !strcmp(address.sun_path, stream_path));
    CHECK(send(both, "named", 5, 0) == 5 && recv(from_both, got, 64, 0) == 5);
    CHECK(recv(packet_accepted, got, 64, 0) == 6 && send(packet_accepted, "ok", 2, 0) == 2 && recv(packet_client, got, 64, 0) == 2);
    CHECK(recv(mailbox, got, 64, 0) == 6 && recv(mailbox, got, 64, 0) == 8 && !memcmp(got, "mail two", 8));
    CHECK(send(sender, "mail 3", 6, 0) == 6 && recv(mailbox, got, 64, 0) == 6);
    int accepted2 = accept(server, NULL, NULL); /* the one that waited */
    CHECK(accepted2 >= 0 && send(accepted2, "hello", 5, 0) == 5 && recv(waiting, got, 64, 0) == 5);
    int late = joined(SOCK_STREAM, stream_path); /* the name still leads here */
    CHECK(accept(server, NULL, NULL) >= 0 && late >= 0);
    CHECK(joined(SOCK_SEQPACKET, hidden_name) >= 0 && accept(hidden, NULL, NULL) >= 0);
    return pass();
}
