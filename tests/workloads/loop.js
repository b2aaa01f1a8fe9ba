// An event loop with timers, workers, compression in the thread pool and a connection to itself; all of it is
// checked, until there is a file `end`.
'use strict';
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const crypto = require('crypto');
const fs = require('fs');
const net = require('net');
const zlib = require('zlib');

const hash = text => crypto.createHash('sha256').update(text).digest('hex');

function wrong(what) {
  console.log('wrong: ' + what);
  process.exit(1);
}

if (!isMainThread) {
  // A chain of hashes, one for each message.
  let chain = 'worker ' + workerData;
  parentPort.on('message', count => {
    for (let i = 0; i < count; i++) chain = hash(chain);
    parentPort.postMessage(chain);
  });
} else {
  process.on('uncaughtException', error => wrong(error.stack));
  const counts = { worker: 0, zip: 0, echo: 0, tick: 0 };
  let end = false;

  for (let number = 0; number < 2; number++) {
    const worker = new Worker(__filename, { workerData: number });
    let expected = 'worker ' + number;
    const ask = () => {
      for (let i = 0; i < 50; i++) expected = hash(expected);
      worker.postMessage(50);
    };
    worker.on('message', chain => {
      if (chain !== expected) wrong('chain of worker ' + number);
      counts.worker++;
      if (end) worker.terminate(); else setTimeout(ask, 5);
    });
    ask();
  }

  const text = Buffer.from(Array.from({ length: 20000 }, (_, i) => 'line ' + i * 7919 % 1000).join('\n'));
  const zip = () => zlib.gzip(text, (error, packed) => {
    if (error) wrong(error);
    zlib.gunzip(packed, (error, unpacked) => {
      if (error || !unpacked.equals(text)) wrong('what was packed');
      counts.zip++;
      if (!end) setTimeout(zip, 3);
    });
  });
  zip();

  const server = net.createServer(socket => socket.pipe(socket));
  server.listen(0, '127.0.0.1', () => {
    const client = net.connect(server.address().port, '127.0.0.1');
    let sent = 0, received = 0;
    const send = () => {
      const piece = Buffer.alloc(3000);
      for (let i = 0; i < piece.length; i++) piece[i] = sent++ % 251;
      client.write(piece);
    };
    client.on('data', data => {
      for (const byte of data) if (byte !== received++ % 251) wrong('byte ' + received + ' of the echo');
      if (received < sent) return;
      counts.echo++;
      if (end) { client.end(); server.close(); } else setTimeout(send, 2);
    });
    send();
  });

  // Objects that live long, and garbage.
  const table = new Map();
  let sum = 0, seed = 1;
  const timer = setInterval(() => {
    for (let i = 0; i < 500; i++) {
      seed = (seed * 1103515245 + 12345) % 2147483648;
      const key = 'key ' + seed % 20000;
      sum += i - (table.get(key)?.value ?? 0);
      table.set(key, { value: i, text: 'x'.repeat(i % 50) });
    }
    let all = 0;
    for (const entry of table.values()) all += entry.value;
    if (all !== sum) wrong('sum of the table');
    counts.tick++;
    if (fs.existsSync('end')) {
      end = true;
      clearInterval(timer);
    }
  }, 10);

  process.on('exit', code => {
    if (code === 0) console.log(Object.values(counts).every(count => count > 5) ? 'pass' : JSON.stringify(counts));
  });
  console.log('ready');
}
