package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"
)

// driveResp sends packed Redis commands, so many in a write, and reads as many answers, on each connection: what the
// server alone can do. The file: for each command 4 bytes of length and the command.
func driveResp(spec *Spec) (*Result, error) {
	data, err := os.ReadFile(spec.File)
	if err != nil {
		return nil, err
	}
	var commands [][]byte
	for len(data) >= 4 {
		size := int(binary.LittleEndian.Uint32(data))
		if len(data) < 4+size {
			return nil, errors.New("the file of commands is cut short")
		}
		commands = append(commands, data[4:4+size])
		data = data[4+size:]
	}
	commands = commands[:min(len(commands), spec.Count)]
	if len(commands) < spec.Connections {
		return nil, errors.New("fewer commands than connections")
	}
	lines := make([]*line, spec.Connections)
	for index := range lines {
		socket, err := dial(spec.Target)
		if err != nil {
			return nil, err
		}
		defer socket.Close()
		share := commands[index*len(commands)/len(lines) : (index+1)*len(commands)/len(lines)]
		lines[index] = &line{
			write:    func(data []byte) error { _, err := socket.Write(data); return err },
			in:       bufio.NewReaderSize(socket, 1<<16),
			commands: share,
		}
	}
	if err := handOver("begin"); err != nil {
		return nil, err
	}
	start := now()
	stopAt := start + int64(spec.Seconds*float64(time.Second))
	var group sync.WaitGroup
	for _, l := range lines {
		group.Add(1)
		go func() {
			defer group.Done()
			l.err = l.run(spec.Batch, stopAt)
		}()
	}
	group.Wait()
	result := &Result{Denied: map[string]int64{}, Failed: map[string]int64{}, Seconds: float64(now()-start) / 1e9}
	if err := handOver("end"); err != nil {
		return nil, err
	}
	for _, l := range lines {
		if l.err != nil {
			return nil, l.err
		}
		result.Calls += l.writes
		result.Decisions += l.decided
		result.Allowed += l.decided
		if l.refused > 0 {
			result.Failed["script"] += l.refused
			result.Example = l.example
		}
		result.Latency.Merge(&l.latency)
	}
	return result, nil
}

type line struct {
	write                    func([]byte) error
	in                       *bufio.Reader
	commands                 [][]byte
	writes, decided, refused int64
	latency                  Histogram
	example                  string
	err                      error
}

func (l *line) run(batch int, stopAt int64) error {
	var out []byte
	for first := 0; first < len(l.commands); first += batch {
		began := now()
		if began > stopAt {
			return nil
		}
		out = out[:0]
		group := l.commands[first:min(first+batch, len(l.commands))]
		for _, command := range group {
			out = append(out, command...)
		}
		if err := l.write(out); err != nil {
			return err
		}
		for range group {
			if err := l.answer(); err != nil {
				return err
			}
		}
		l.writes++
		l.latency.Add(now() - began)
	}
	return nil
}

// answer reads one answer: a text that says it was decided, or anything else.
func (l *line) answer() error {
	head, err := l.in.ReadSlice('\n')
	if err != nil {
		return err
	}
	if head[0] != '$' {
		l.refuse(head)
		return nil
	}
	size, err := strconv.Atoi(string(bytes.TrimSpace(head[1:])))
	if err != nil || size < 0 {
		return fmt.Errorf("an answer that is no text: %q", head)
	}
	body, err := l.in.Peek(min(size+2, 40))
	if err != nil {
		return err
	}
	if size > 0 && body[0] == '=' {
		l.decided++
	} else {
		l.refuse(body)
	}
	_, err = l.in.Discard(size + 2)
	return err
}

func (l *line) refuse(what []byte) {
	l.refused++
	if l.example == "" {
		l.example = string(what)
	}
}
