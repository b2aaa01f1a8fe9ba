// Goroutines that check channels, maps, locks, timers and connections, until there is a file `end`.
package main

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

func check(right bool, what string) {
	if !right {
		fmt.Println("wrong:", what)
		os.Exit(1)
	}
}

var end atomic.Bool

// A map whose sum is known, and garbage.
func table(number uint64) {
	values := map[uint64][]byte{}
	var sum uint64
	seed := number
	for !end.Load() {
		for i := 0; i < 3000; i++ {
			seed = seed*6364136223846793005 + 1442695040888963407
			key := seed >> 48
			if old, there := values[key]; there {
				sum -= binary.LittleEndian.Uint64(old)
			}
			fresh := make([]byte, 8+seed>>58)
			binary.LittleEndian.PutUint64(fresh, seed)
			values[key] = fresh
			sum += seed
		}
		var all uint64
		for _, value := range values {
			all += binary.LittleEndian.Uint64(value)
		}
		check(all == sum, fmt.Sprint("sum of table ", number))
		time.Sleep(2 * time.Millisecond)
	}
}

// Numbers around a ring of goroutines, each of which adds one.
func ring() {
	const length = 50
	first := make(chan uint64)
	last := first
	for i := 0; i < length; i++ {
		next := make(chan uint64)
		go func(from, to chan uint64) {
			for value := range from {
				to <- value + 1
			}
			close(to)
		}(last, next)
		last = next
	}
	for round := uint64(0); !end.Load(); round++ {
		first <- round
		check(<-last == round+length, "ring")
		time.Sleep(time.Millisecond)
	}
	close(first)
}

// Everything that is sent comes back, in order.
func echo() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err == nil, fmt.Sprint(err))
	go func() {
		from, err := listener.Accept()
		check(err == nil, fmt.Sprint(err))
		_, err = io.Copy(from, from)
		check(err == nil, fmt.Sprint(err))
		from.Close()
	}()
	to, err := net.Dial("tcp", listener.Addr().String())
	check(err == nil, fmt.Sprint(err))
	sent, got := fnv.New64a(), fnv.New64a()
	piece, back := make([]byte, 5000), make([]byte, 5000)
	for round := 0; !end.Load(); round++ {
		for i := range piece {
			piece[i] = byte(round * i)
		}
		sent.Write(piece)
		_, err := to.Write(piece)
		check(err == nil, fmt.Sprint(err))
		_, err = io.ReadFull(to, back)
		check(err == nil, fmt.Sprint(err))
		got.Write(back)
		check(sent.Sum64() == got.Sum64(), "echo")
		time.Sleep(time.Millisecond)
	}
	to.Close()
}

func main() {
	var all sync.WaitGroup
	var lock sync.Mutex
	counted, rounds := 0, atomic.Int64{}
	start := func(act func()) {
		all.Add(1)
		go func() { act(); all.Done() }()
	}
	for i := uint64(0); i < 4; i++ {
		number := i
		start(func() { table(number) })
	}
	start(ring)
	start(echo)
	for i := 0; i < 20; i++ {
		start(func() {
			ticker := time.NewTicker(3 * time.Millisecond)
			for !end.Load() {
				<-ticker.C
				lock.Lock()
				counted++
				lock.Unlock()
				rounds.Add(1)
			}
		})
	}
	fmt.Println("ready")
	for {
		if _, err := os.Stat("end"); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	end.Store(true)
	all.Wait()
	check(int64(counted) == rounds.Load() && counted > 0, "what was counted")
	fmt.Println("pass")
}
