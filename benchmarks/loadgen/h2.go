package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"

	"golang.org/x/net/http2/hpack"
)

// As much of an HTTP/2 client as a gRPC load needs, made to cost little: one reader, one writer, no task a call.

const (
	frameData, frameHeaders, frameReset, frameSettings      = 0, 1, 3, 4
	framePing, frameGoAway, frameWindow, frameContinuation  = 6, 7, 8, 9
	flagEndStream, flagAck, flagEndHeaders, flagPadded      = 1, 1, 4, 8
	flagPriority                                            = 0x20
	settingTableSize, settingInitialWindow, settingMaxFrame = 1, 4, 5
	settingPush                                             = 2

	streamWindow     = 1 << 28 // what the peer may send on a stream; the connection's is as large
	connectionWindow = 1 << 30
	statusUnknown    = 2
)

// caller is told what becomes of its streams, with the connection locked.
type caller interface {
	message(s *stream, data []byte)
	ended(s *stream, status int)
	broken(err error)
}

type stream struct {
	id       uint32
	due      int64  // when it was to be sent, ns
	request  []byte // kept for a later replay
	items    int    // decisions in it
	answered bool
	window   int64
	waiting  []byte // may not be sent yet
	ends     bool   // after what waits
	over     bool   // the peer has ended it
	in       []byte // an answer that is not complete
	received int
}

type conn struct {
	sync.Mutex
	net      net.Conn
	caller   caller
	fields   []hpack.HeaderField // of every request
	encoder  *hpack.Encoder
	block    bytes.Buffer
	streams  map[uint32]*stream
	lastID   uint32
	window   int64 // what we may send
	initial  int64
	maxFrame int
	received int
	out      []byte
	wake     *sync.Cond
	closed   bool
	err      error
	decoder  *hpack.Decoder
	status   int
	fragment []byte
	free     []*stream
}

func connect(target, path string, timeoutMs int, c caller) (*conn, error) {
	socket, err := dial(target)
	if err != nil {
		return nil, err
	}
	k := &conn{
		net: socket, caller: c, streams: make(map[uint32]*stream), lastID: ^uint32(0),
		window: 65535, initial: 65535, maxFrame: 16384,
		fields: requestHeaders(path, timeoutMs),
	}
	k.encoder = hpack.NewEncoder(&k.block)
	k.wake = sync.NewCond(k)
	k.decoder = hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		if f.Name == "grpc-status" {
			k.status = 0
			fmt.Sscanf(f.Value, "%d", &k.status)
		}
	})
	k.out = append(k.out, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"...)
	k.out = append(k.out, frameHeader(18, frameSettings, 0, 0)...)
	for _, s := range [][2]uint32{{settingTableSize, 4096}, {settingPush, 0}, {settingInitialWindow, streamWindow}} {
		k.out = binary.BigEndian.AppendUint16(k.out, uint16(s[0]))
		k.out = binary.BigEndian.AppendUint32(k.out, s[1])
	}
	k.credit(0, connectionWindow-65535)
	go k.write()
	go k.read()
	return k, nil
}

// requestHeaders are the same for every call: but for the first one they are an index each, as other clients send them.
func requestHeaders(path string, timeoutMs int) []hpack.HeaderField {
	return []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path},
		{Name: ":authority", Value: "localhost"}, {Name: "te", Value: "trailers"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "user-agent", Value: "entitlement-bench"},
		{Name: "grpc-timeout", Value: fmt.Sprintf("%dm", timeoutMs)},
	}
}

func frameHeader(size int, kind, flags byte, id uint32) []byte {
	head := []byte{byte(size >> 16), byte(size >> 8), byte(size), kind, flags, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(head[5:], id)
	return head
}

func (k *conn) frame(kind, flags byte, id uint32, payload []byte) {
	size := len(payload)
	k.out = append(k.out, byte(size>>16), byte(size>>8), byte(size), kind, flags, byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
	k.out = append(k.out, payload...)
}

func (k *conn) credit(id uint32, bytes uint32) {
	k.frame(frameWindow, 0, id, binary.BigEndian.AppendUint32(nil, bytes))
}

// open starts a stream; locked.
func (k *conn) open() *stream {
	k.lastID += 2
	var s *stream
	if n := len(k.free); n > 0 {
		s, k.free = k.free[n-1], k.free[:n-1]
		*s = stream{in: s.in[:0], waiting: s.waiting[:0], request: s.request[:0]}
	} else {
		s = &stream{}
	}
	s.id, s.window = k.lastID, k.initial
	k.streams[s.id] = s
	k.block.Reset()
	for _, field := range k.fields {
		k.encoder.WriteField(field)
	}
	k.frame(frameHeaders, flagEndHeaders, s.id, k.block.Bytes())
	return s
}

// send sends data on a stream, as far as the peer's windows let it; the rest follows by itself. Locked.
func (k *conn) send(s *stream, data []byte, end bool) {
	if len(s.waiting) > 0 {
		s.waiting = append(s.waiting, data...)
		s.ends = s.ends || end
	} else if rest := k.push(s, data, end); len(rest) > 0 {
		s.waiting = append(s.waiting[:0], rest...)
		s.ends = end
	}
}

func (k *conn) push(s *stream, data []byte, end bool) []byte {
	for {
		n := int(min(int64(len(data)), int64(k.maxFrame), s.window, k.window))
		if n <= 0 && len(data) > 0 {
			return data
		}
		flags := byte(0)
		if end && n == len(data) {
			flags = flagEndStream
		}
		k.frame(frameData, flags, s.id, data[:n])
		s.window -= int64(n)
		k.window -= int64(n)
		if data = data[n:]; len(data) == 0 {
			return nil
		}
	}
}

func (k *conn) pushWaiting(s *stream) {
	if len(s.waiting) > 0 {
		rest := k.push(s, s.waiting, s.ends)
		s.waiting = append(s.waiting[:0], rest...)
	}
}

// flush lets the writer write; locked.
func (k *conn) flush() {
	if len(k.out) > 0 {
		k.wake.Signal()
	}
}

func (k *conn) write() {
	var buffer []byte
	for {
		k.Lock()
		for len(k.out) == 0 && !k.closed {
			k.wake.Wait()
		}
		if k.closed {
			k.Unlock()
			return
		}
		buffer, k.out = k.out, buffer[:0]
		k.Unlock()
		if _, err := k.net.Write(buffer); err != nil {
			k.fail(err)
			return
		}
	}
}

func (k *conn) close() {
	k.Lock()
	k.closed = true
	k.wake.Signal()
	k.Unlock()
	k.net.Close()
}

func (k *conn) fail(err error) {
	k.Lock()
	defer k.Unlock()
	if k.closed || k.err != nil {
		return
	}
	k.err = err
	k.closed = true
	k.wake.Signal()
	k.caller.broken(err)
}

func (k *conn) read() {
	in := bufio.NewReaderSize(k.net, 1<<18)
	var head [9]byte
	payload := make([]byte, 0, 1<<16)
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			k.fail(err)
			return
		}
		size := int(head[0])<<16 | int(head[1])<<8 | int(head[2])
		if size > cap(payload) {
			payload = make([]byte, 0, size)
		}
		payload = payload[:size]
		if _, err := io.ReadFull(in, payload); err != nil {
			k.fail(err)
			return
		}
		k.Lock()
		err := k.handle(head[3], head[4], binary.BigEndian.Uint32(head[5:])&0x7fffffff, payload)
		if in.Buffered() < 9 {
			k.flush()
		}
		k.Unlock()
		if err != nil {
			k.fail(err)
			return
		}
	}
}

func (k *conn) handle(kind, flags byte, id uint32, payload []byte) error {
	switch kind {
	case frameData:
		return k.data(flags, id, payload)
	case frameHeaders:
		if flags&flagPadded != 0 && len(payload) > 0 {
			payload = payload[1 : len(payload)-int(payload[0])]
		}
		if flags&flagPriority != 0 {
			payload = payload[5:]
		}
		k.fragment = append(k.fragment[:0], payload...)
		if flags&flagEndStream != 0 {
			if s := k.streams[id]; s != nil {
				s.over = true
			}
		}
		return k.headers(flags, id, flags&flagEndStream != 0)
	case frameContinuation:
		k.fragment = append(k.fragment, payload...)
		s := k.streams[id]
		return k.headers(flags, id, s != nil && s.over)
	case frameReset:
		if s := k.streams[id]; s != nil {
			k.end(s, statusUnknown)
		}
	case frameSettings:
		k.settings(flags, payload)
	case framePing:
		if flags&flagAck == 0 {
			k.frame(framePing, flagAck, 0, payload)
		}
	case frameGoAway:
		return fmt.Errorf("the server went away: %q", payload)
	case frameWindow:
		k.credited(id, int64(binary.BigEndian.Uint32(payload)))
	}
	return nil
}

func (k *conn) headers(flags byte, id uint32, end bool) error {
	if flags&flagEndHeaders == 0 {
		return nil
	}
	k.status = statusUnknown
	if _, err := k.decoder.Write(k.fragment); err != nil {
		return err
	}
	if err := k.decoder.Close(); err != nil {
		return err
	}
	if s := k.streams[id]; s != nil && end {
		k.end(s, k.status)
	}
	return nil
}

func (k *conn) data(flags byte, id uint32, payload []byte) error {
	if k.received += len(payload); k.received > connectionWindow/2 {
		k.credit(0, uint32(k.received))
		k.received = 0
	}
	s := k.streams[id]
	if s == nil {
		return nil
	}
	if s.received += len(payload); s.received > streamWindow/2 {
		k.credit(id, uint32(s.received))
		s.received = 0
	}
	if flags&flagPadded != 0 && len(payload) > 0 {
		payload = payload[1 : len(payload)-int(payload[0])]
	}
	whole := payload
	if len(s.in) > 0 {
		s.in = append(s.in, payload...)
		whole = s.in
	}
	for len(whole) >= 5 {
		size := int(binary.BigEndian.Uint32(whole[1:]))
		if len(whole) < 5+size {
			break
		}
		k.caller.message(s, whole[5:5+size])
		whole = whole[5+size:]
	}
	s.in = append(s.in[:0], whole...)
	if flags&flagEndStream != 0 {
		k.end(s, statusUnknown)
	}
	return nil
}

func (k *conn) end(s *stream, status int) {
	delete(k.streams, s.id)
	k.caller.ended(s, status)
	k.free = append(k.free, s)
}

func (k *conn) settings(flags byte, payload []byte) {
	if flags&flagAck != 0 {
		return
	}
	for ; len(payload) >= 6; payload = payload[6:] {
		value := int64(binary.BigEndian.Uint32(payload[2:]))
		switch binary.BigEndian.Uint16(payload) {
		case settingInitialWindow:
			for _, s := range k.streams {
				s.window += value - k.initial
			}
			k.initial = value
		case settingMaxFrame:
			k.maxFrame = int(value)
		}
	}
	k.frame(frameSettings, flagAck, 0, nil)
	for _, s := range k.streams {
		k.pushWaiting(s)
	}
}

func (k *conn) credited(id uint32, bytes int64) {
	if id != 0 {
		if s := k.streams[id]; s != nil {
			s.window += bytes
			k.pushWaiting(s)
		}
		return
	}
	k.window += bytes
	for _, s := range k.streams {
		k.pushWaiting(s)
	}
}
